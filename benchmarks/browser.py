"""A headless Chromium or Chrome, controlled over the DevTools protocol through a pair of pipes.

Nothing listens on a port, and the browser ends when the pipes are closed, even if this process is killed.
The protocol is documented at https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--disable-breakpad",
    "--password-store=basic",
    "--no-proxy-server",
    "--remote-debugging-pipe",
)
TIMEOUT = 60  # seconds, for whatever is waited for
POLL_INTERVAL = 0.01  # seconds
READ_SIZE = 1 << 20  # bytes


def find_browser():
    """Return the path of an installed Chromium or Chrome, or None."""
    for name in NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


class Browser:
    """A running browser with one page. `close` ends it and removes its temporary files."""

    def __init__(self, program):
        self.folder = Path(tempfile.mkdtemp(prefix="s7-"))
        environment = {**os.environ, "HOME": str(self.folder), "TMPDIR": str(self.folder)}
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"):
            environment.pop(name, None)
        command = [program, *OPTIONS, f"--user-data-dir={self.folder / 'profile'}", "about:blank"]
        # The browser reads commands from file descriptor 3 and writes replies to 4.
        pipes = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'
        self.process = subprocess.Popen(
            ["sh", "-c", pipes, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self.unfinished = b""  # the beginning of a message
        self.commands = 0
        self.replies = {}
        self.events = []
        self.session = None
        self.url = None

    def show(self, html, width=900, height=700, density=1):
        """Show a document in a window of this size in CSS pixels; `density` is the device pixel ratio."""
        if self.session is None:
            self.attach()
        size = {"width": width, "height": height, "deviceScaleFactor": density, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[])
        self.events.clear()
        path = self.folder / "page.html"
        path.write_text(html, encoding="utf-8")
        self.url = path.as_uri()
        document = self.call("Page.navigate", url=self.url)["loaderId"]
        deadline = time.monotonic() + TIMEOUT
        while not self.is_loaded(document):
            self.receive(deadline)

    def is_loaded(self, document):
        """Return whether a document, by its loader's id, is loaded."""
        for event in self.received("Page.lifecycleEvent"):
            if event["loaderId"] == document and event["name"] == "load":
                return True
        return False

    def attach(self):
        """Connect to the page that the browser has opened."""
        deadline = time.monotonic() + TIMEOUT
        pages = []
        while not pages:
            targets = self.call("Target.getTargets")["targetInfos"]
            pages = [target for target in targets if target["type"] == "page"]
            if time.monotonic() > deadline:
                raise TimeoutError(f"the browser opened no page within {TIMEOUT} seconds")
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def call(self, method, **parameters):
        """Send a command, wait for its reply and return its result; raise RuntimeError if it failed."""
        self.commands += 1
        number = self.commands
        message = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        deadline = time.monotonic() + TIMEOUT
        while number not in self.replies:
            self.receive(deadline)
        reply = self.replies.pop(number)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def receive(self, deadline):
        """Wait for output of the browser, which may complete several messages, each a reply or an event."""
        output = self.process.stdout.fileno()
        remaining = max(0, deadline - time.monotonic())
        ready, _, _ = select.select([output], [], [], remaining)
        if not ready:
            raise TimeoutError(f"the browser did not answer within {TIMEOUT} seconds")
        data = os.read(output, READ_SIZE)
        if not data:
            raise RuntimeError(f"the browser ended with status {self.process.wait()}")
        *messages, self.unfinished = (self.unfinished + data).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self.replies[message["id"]] = message
            else:
                self.events.append(message)

    def received(self, method):
        """Return the parameters of the events of a kind, such as "Log.entryAdded", since `show`."""
        return [event["params"] for event in self.events if event["method"] == method]

    def evaluate(self, expression):
        """Return the value of a JavaScript expression; raise RuntimeError if it throws an exception."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def wait_until(self, condition):
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + TIMEOUT
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {TIMEOUT} seconds: {condition}")
            time.sleep(POLL_INTERVAL)

    def screenshot(self):
        """Return a picture of the window as a PIL image."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def drag_mouse(self, points):
        """Press the mouse button at the first of the points (x, y), move along them, and release it."""
        self.move_mouse("mousePressed", points[0])
        for point in points[1:]:
            self.move_mouse("mouseMoved", point)
        self.move_mouse("mouseReleased", points[-1])

    def move_mouse(self, kind, point, button="left"):
        """Dispatch a mouse event at a point with a button held."""
        x, y = point
        buttons = {"left": 1, "right": 2}[button]
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1
        )

    def drag_finger(self, points):
        """Touch the screen at the first of the points (x, y), move along them, and lift the finger."""
        self.move_fingers("touchStart", points[:1])
        for point in points[1:]:
            self.move_fingers("touchMove", [point])
        self.move_fingers("touchEnd", [])

    def move_fingers(self, kind, points):
        """Dispatch a touch event with the points where the fingers are."""
        fingers = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        self.call("Input.dispatchTouchEvent", type=kind, touchPoints=fingers)

    def press_key(self, key, code, text=""):
        """Press and release a key, given by its name and its Windows key code."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text
            )

    def close(self):
        """End the browser with all its processes, and remove its temporary files."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)
