"""moe/routers."""
