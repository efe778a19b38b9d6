"""Images to train and evaluate on: where they come from, decoded once, some held out, augmented."""
