"""Full-Duplex-Bench v1 (arXiv 2503.04721) and v1.5 (arXiv 2507.23159): its folders, its metrics, its table."""
