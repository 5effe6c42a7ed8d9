"""From any set of runs to one side-by-side table and its figures, computed from stored rows."""
