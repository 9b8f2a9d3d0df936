"""Options and a module in, adapted layers out, and back."""
