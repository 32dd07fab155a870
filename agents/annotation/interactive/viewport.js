// Which part of the image the frame shows: zoom and pan, by wheel, fingers, drag, keys and buttons,
// and the pixels of a large image where it is looked at. A mixin of canvas.js, whose `scene` it shows.
const LARGEST = 32; // side of a pixel of the image at the highest zoom, in those of the page
const CRISP = 3; // side from which on it is drawn as a square
export const STEP = 1.5; // zoom of a key or button
const SLACK = 40; // how far the border of a zoomed image comes into the frame
const WAIT = 150; // milliseconds for which the view rests before its pixels are asked for
const limit = (value, low, high) => Math.min(Math.max(value, low), high);
export default {
  data: () => ({ frame: [1, 1], zoom: 1, centre: [0.5, 0.5], moving: false, space: false, detail: null }),
  computed: {
    fitted() {
      const { width, height } = this.scene;
      const scale = Math.min(this.frame[0] / width, this.frame[1] / height);
      return [width * scale, height * scale];
    },
    size() {
      return this.fitted.map((side) => side * this.zoom);
    },
    pixel() {
      return this.size[0] / this.scene.width;
    },
    placed() {
      const start = this.pointOf([0, 0]).map((value, i) => value + this.frame[i] / 2);
      return { left: start[0] + "px", top: start[1] + "px", width: this.size[0] + "px", height: this.size[1] + "px" };
    },
    crisp() {
      return this.pixel >= CRISP;
    },
    // Corners of what is seen, in pixels of the image.
    seen() {
      const sides = [this.scene.width, this.scene.height];
      const at = (side, round) => sides.map((length, i) => {
        const fraction = this.centre[i] + (side * this.frame[i]) / (2 * this.size[i]);
        return limit(round(fraction * length), 0, length);
      });
      return [...at(-1, Math.floor), ...at(1, Math.ceil)];
    },
    // Address of these pixels, while the image that is there has less of them than the screen.
    detailed() {
      const { src, width, shown } = this.scene;
      const enough = shown === width || this.size[0] * window.devicePixelRatio <= shown;
      return !src || enough ? "" : `${src}?window=${this.seen}`;
    },
  },
  watch: {
    "scene.src"() {
      this.detail = null;
    },
    detailed(address) {
      clearTimeout(this.waiting);
      if (!address) this.detail = null;
      else this.waiting = setTimeout(() => this.sharpen(address, this.seen), WAIT);
    },
  },
  created() {
    this.fingers = new Map();
  },
  methods: {
    measure() {
      const { clientWidth, clientHeight } = this.$refs.frame;
      this.frame = [clientWidth, clientHeight];
      this.look(this.zoom);
    },
    fit() {
      this.zoom = 1;
      this.centre = [0.5, 0.5];
    },
    // Zoom about a point of the frame, which then moves. Points are in pixels from its middle.
    look(zoom, at = [0, 0], by = [0, 0]) {
      const before = this.size;
      this.zoom = limit(zoom, 1, Math.max(1, (LARGEST * this.scene.width) / this.fitted[0]));
      const after = this.size;
      const slack = this.zoom > 1 ? SLACK : 0;
      this.centre = this.centre.map((value, i) => {
        const edge = (this.fitted[i] / 2 - slack) / after[i]; // the image covers where it was at first
        return limit(value + at[i] / before[i] - (at[i] + by[i]) / after[i], edge, 1 - edge);
      });
    },
    zoomBy(factor) {
      this.look(this.zoom * factor, this.cursor ? this.pointOf(this.cursor) : [0, 0]);
    },
    pointOf(at) {
      return at.map((value, i) => (value - this.centre[i]) * this.size[i]);
    },
    pointAt(event) {
      const area = this.$refs.frame.getBoundingClientRect();
      return [event.clientX - area.left - area.width / 2, event.clientY - area.top - area.height / 2];
    },
    // Move the view as little as shows a place of the image.
    reveal(at) {
      const inside = (value, i) => limit(value, SLACK - this.frame[i] / 2, this.frame[i] / 2 - SLACK);
      this.look(this.zoom, [0, 0], this.pointOf(at).map((value, i) => inside(value, i) - value));
    },
    wheel(event) {
      const pixels = limit(event.deltaY * [1, 16, 400][event.deltaMode], -200, 200);
      const speed = event.ctrlKey ? 0.01 : 0.002; // a pinch on a trackpad comes with Ctrl
      this.look(this.zoom * Math.exp(-speed * pixels), this.pointAt(event));
    },
    // Presses that move the view: of the middle button, with Space, of a second finger.
    grab(event) {
      this.fingers.set(event.pointerId, this.pointAt(event));
      this.$refs.frame.setPointerCapture(event.pointerId);
      if (this.space) this.space = "used";
      this.moving ||= this.fingers.size > 1 || event.button === 1 || !!this.space;
      return this.moving;
    },
    pull(event) {
      if (!this.fingers.has(event.pointerId)) return;
      const before = this.grip();
      this.fingers.set(event.pointerId, this.pointAt(event));
      const after = this.grip();
      const by = after.at.map((value, i) => value - before.at[i]);
      if (this.moving) this.look((this.zoom * after.apart) / before.apart, before.at, by);
    },
    release(event) {
      this.fingers.delete(event.pointerId);
      if (!this.fingers.size) this.moving = false;
    },
    // Where the first two fingers are, and how far apart.
    grip() {
      const [a, b = a] = this.fingers.values();
      const apart = Math.hypot(a[0] - b[0], a[1] - b[1]) || 1;
      return { at: [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2], apart };
    },
    async sharpen(address, [x0, y0, x1, y1]) {
      const image = new Image();
      image.src = address;
      const arrived = await image.decode().then(() => true, () => false);
      if (!arrived || address !== this.detailed) return;
      const { width, height } = this.scene;
      const style = {
        left: this.pc(x0 / width), top: this.pc(y0 / height),
        width: this.pc((x1 - x0) / width), height: this.pc((y1 - y0) / height),
      };
      this.detail = { src: address, style };
    },
    pc: (fraction) => 100 * fraction + "%",
  },
};
