"""A name that breaks out of HTML, script elements and attributes where it is not escaped."""

EVIL = '</script><img src=x onerror="window.broken=1">&<b>'
