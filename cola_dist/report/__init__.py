"""The page that people look at: sweep folders in, one self-contained HTML file, small figures and raw tables out."""
