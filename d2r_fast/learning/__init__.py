"""One update: its equations (`sac`) and how training makes it (`update`), what it changes, the replay that it draws
from, and the learner that runs it."""
