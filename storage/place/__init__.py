"""Where bytes lie: local folders, web servers and object stores."""
