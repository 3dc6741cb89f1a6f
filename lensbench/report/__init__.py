"""What people look at: terminal tables, figures, comparisons, pages, traces."""
