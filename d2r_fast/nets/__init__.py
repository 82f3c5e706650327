"""Networks, and the actor, critics and agent around them."""
