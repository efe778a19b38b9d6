"""The PRG method and its offline scripts: pretrain, fine-tune, evaluate, export."""
