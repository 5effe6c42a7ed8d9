"""What a run leaves: its record, status, events and objective; imports nothing that makes it."""
