"""``python -m phi3v.evaluators`` prints the folder of the tasks, for lmms-eval's ``--include_path``."""

from phi3v.evaluators import TASKS

if __name__ == "__main__":
    print(TASKS)
