"""What the Hotpath panel of the front end shows and does: caches, libraries, model files, downloads.

`overview` and `libraries` gather it, `downloads` brings model files, `routes` offers both to the browser.
"""

from .downloads import DownloadDesk, Refused
from .libraries import LibraryReport
from .overview import overview
from .routes import attach

__all__ = ["DownloadDesk", "LibraryReport", "Refused", "attach", "overview"]
