"""What follows an optimizer step."""
