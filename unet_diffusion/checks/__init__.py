"""What will be trained on what: data, labels, captions and settings that are likely to waste a run, found before it."""
