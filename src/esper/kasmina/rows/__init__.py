"""Row layers: ordinary layers whose parameters carry a leading row dimension."""
