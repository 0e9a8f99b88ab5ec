"""The first minutes on a GPU: `weftrain gpu` proves and measures as much of weftrain as eight minutes allow.

Every check of checks.py runs in a process of its own with a time limit, and writes what it finds at once, one JSON
object a line, so that a crash, a hang or the end of the machine's time loses nothing before it. report.html is written
from those lines. On a machine without a GPU `--dry` asks the same questions at tiny sizes.
"""
