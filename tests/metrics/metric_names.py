"""The shipped `evaluate` modules by kind."""

PER_CLASS, OF_GROUPS = ["g_mean", "worst_class_recall"], ["equalized_odds_gap", "worst_group_accuracy"]
NAMES = sorted([*PER_CLASS, *OF_GROUPS, "macro_auprc", "map_at_r", "misclassification", "recall_at_k"])
