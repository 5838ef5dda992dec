"""The metric at a phi, by a forward pass: the data, the model's predictions, the black box, and its ledger."""
