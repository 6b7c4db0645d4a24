"""What the chapters compute from records and live runs, one module for each chapter, named like it."""
