"""What runs tell once they are made: pictures and tables from their metrics."""
