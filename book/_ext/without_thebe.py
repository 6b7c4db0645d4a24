"""Take the live-code scripts off the pages: Jupyter Book adds them twice, and the second is an error."""


def remove(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    context["script_files"] = [script for script in context["script_files"] if not _is_thebe(script)]


def _is_thebe(script) -> bool:
    body = getattr(script, "attributes", {}).get("body") or ""
    return "thebe" in str(getattr(script, "filename", script)) or "THEBE_JS_URL" in body


def setup(app) -> dict:
    app.connect("html-page-context", remove, priority=900)  # after those that add scripts
    return {"parallel_read_safe": True, "parallel_write_safe": True}
