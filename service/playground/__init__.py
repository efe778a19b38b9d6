"""The web page at /: plain HTML, CSS and ES modules, no framework, no build step, nothing from other hosts."""
