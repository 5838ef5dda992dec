"""The shipped `evaluate` modules by kind."""

PER_CLASS, OF_GROUPS = ["g_mean", "worst_class_recall"], ["equalized_odds_gap", "worst_group_accuracy"]
OF_EMBEDDINGS = ["map_at_r", "recall_at_k"]
NAMES = sorted([*PER_CLASS, *OF_GROUPS, *OF_EMBEDDINGS, "macro_auprc", "misclassification"])
