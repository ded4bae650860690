"""Compare the union with a plain tree in memory."""
