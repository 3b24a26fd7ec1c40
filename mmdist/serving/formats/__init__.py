"""One file a request format: `router`, and `render_error(ServeError) -> Response` in its shape."""
