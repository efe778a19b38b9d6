"""The web page at /: plain HTML, CSS and ES modules, with no build step."""
