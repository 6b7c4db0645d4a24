"""What the chapters of the book are run, checked and drawn with."""
