"""What tests share: ways to train, spies, and a reference to compare with."""
