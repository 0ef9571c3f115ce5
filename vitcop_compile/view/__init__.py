"""What was kept, to be seen: a page on which methods and retentions stand side by side, and a picture of them all."""

from .collect import Collector
from .record import Record, Run
from .render import page, save_page
from .sheet import sheet

__all__ = ["Collector", "Record", "Run", "page", "save_page", "sheet"]
