"""What the demo's agents are asked when nobody asks something else."""

QUESTIONS = (
    "how do I copy a directory tree?",
    "how can I cache the results of a function?",
    "how do I replace text that matches a pattern?",
    "how do I run a shell command and get its output?",
    "how do I find the greatest common divisor of two numbers?",
    "how do I list the contents of a directory?",
)
