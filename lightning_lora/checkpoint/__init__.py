"""The dictionary that Lightning writes and reads: its format, merged on its way out, taken apart on its way in."""
