"""The paper's benchmarks, methods and published numbers."""

PROBLEMS = dict(  # by task, in the order of its table
    aime=30, amc=83, math=500, minerva=272, olympiad_bench=675
)
TASKS = tuple(PROBLEMS)
CONTEXT = 4096  # tokens of prompt and response together

METHODS = {  # the name of each --method in tables and figures, in the order in which they stand
    "sft": "SFT",
    "grpo": "GRPO",
    "force-r": "Force-R",
    "force-r-eda": "Force-R & EDA",
    "edge-grpo": "EDGE-GRPO",
    "dr-grpo": "Dr. GRPO",
    "dapo": "DAPO",
}

# Accuracy in percent, trained on DeepScaleR-Hard-1K: average, then by task. The paper has only the
# average of the base models, and of the withdrawn `1k-` rows, which were trained on a sample of 1K
# problems that was not chosen for hardness.
TABLE = """
1.5b-sft         29.17  6.67 28.92 46.40 12.87 24.00
1.5b-grpo        40.26 10.00 46.99 65.00 20.59 30.37
1.5b-force-r     41.55 13.33 31.33 70.00 22.06 30.81
1.5b-force-r-eda 42.44 10.00 34.94 69.60 23.53 32.30
1.5b-edge-grpo   47.24 10.00 44.58 73.20 29.04 37.33
7b-sft           37.37  3.33 44.58 68.00 19.85 22.37
7b-grpo          47.69 26.67 53.01 74.20 25.74 37.19
7b-force-r       40.26 13.33 40.96 67.60 19.85 29.33
7b-force-r-eda   45.19 26.67 50.60 68.00 28.68 35.11
7b-edge-grpo     53.21 16.67 53.01 79.00 36.03 42.67
1.5b-base           25.71
1k-1.5b-sft         30.13
1k-1.5b-grpo        40.32
1k-1.5b-force-r     42.63
1k-1.5b-force-r-eda 45.83
1k-1.5b-edge-grpo   48.08
7b-base             29.04
1k-7b-sft           41.99
1k-7b-grpo          46.47
1k-7b-force-r       47.76
1k-7b-force-r-eda   45.71
1k-7b-edge-grpo     49.30
"""
PUBLISHED = {}
for line in TABLE.split("\n")[1:-1]:
    row, *numbers = line.split()
    PUBLISHED[row] = dict(zip(("average", *TASKS), map(float, numbers)))
