"""The union against a plain tree in memory."""
