// The image with masks and clicks over it. Emits `press` (a click at a fraction of the image), `box`
// and `key`; the crosshair of the keyboard and the frame of a box being dragged live here alone.
import viewport, { STEP } from "viewport";
const DRAG = 6; // pixels that make a click a box
const BUTTONS = "button, a, [role=button], [role=switch]";
const ZOOMS = { "+": STEP, "=": STEP, "-": 1 / STEP, _: 1 / STEP, 0: 0 };
export default {
  mixins: [viewport],
  template: `
    <div class="sg-frame" ref="frame" :class="{ 'sg-moving': moving || space, 'sg-crisp': crisp }"
         @pointerdown="down" @pointermove="move" @pointerup="up" @pointercancel="cancel"
         @pointerenter="enter" @mousedown.middle.prevent @wheel.prevent="wheel" @contextmenu.prevent
         @dragover.prevent @drop.prevent="dropped">
      <div v-show="scene.src" class="sg-stage" ref="stage" tabindex="0" role="application"
           aria-label="Image. Arrow keys move the crosshair, space clicks." :style="placed">
        <img :src="scene.src" :alt="scene.file" class="sg-picture" draggable="false">
        <img v-if="detail" class="sg-picture sg-detail" :src="detail.src" :style="detail.style" alt=""
             draggable="false">
        <img v-if="scene.heat" class="sg-heat" :src="scene.heat" alt="click probabilities" draggable="false">
        <svg :viewBox="'0 0 ' + scene.width + ' ' + scene.height" preserveAspectRatio="none">
          <path v-for="own in scene.objects" :key="own.id" :d="own.path" :fill="own.colour"
                :stroke="own.colour" class="sg-object" />
          <path v-for="(own, i) in scene.suggestions" :key="'s' + i" :d="own.path" :fill="own.colour"
                :stroke="own.colour" :class="['sg-suggestion', { 'sg-selected': i === scene.selected }]" />
          <path :d="scene.path" class="sg-current" data-testid="mask" />
        </svg>
        <svg>
          <rect v-if="rect" :x="pc(rect[0])" :y="pc(rect[1])" :width="pc(rect[2] - rect[0])"
                :height="pc(rect[3] - rect[1])" class="sg-box" />
          <g v-for="(mark, i) in scene.marks" :key="i"
             :class="['sg-mark', mark.positive ? 'sg-positive' : 'sg-negative']">
            <circle :cx="pc(mark.at[0])" :cy="pc(mark.at[1])" :r="i === scene.marks.length - 1 ? 8 : 6" />
            <circle v-if="mark.agent" :cx="pc(mark.at[0])" :cy="pc(mark.at[1])" r="2.5" class="sg-agent" />
          </g>
          <g v-if="cursor" class="sg-cursor">
            <line :x1="pc(cursor[0])" :x2="pc(cursor[0])" y1="0" y2="100%" />
            <line :y1="pc(cursor[1])" :y2="pc(cursor[1])" x1="0" x2="100%" />
          </g>
        </svg>
      </div>
      <div v-show="scene.src" class="sg-zoom" @pointerdown.stop @click="leave">
        <q-btn v-if="zoom > 1" dense flat icon="remove" title="Zoom out (-)" aria-label="Zoom out (-)"
               @click="zoomBy(1 / STEP)" />
        <q-btn v-if="zoom > 1" dense flat no-caps :label="zoom.toFixed(1) + '×'" title="Whole image (0)"
               aria-label="Whole image (0)" @click="fit" />
        <q-btn dense flat icon="add" title="Zoom in (+)" aria-label="Zoom in (+)" @click="zoomBy(STEP)" />
      </div>
    </div>
  `,
  data() {
    return {
      scene: {
        src: "", file: "", width: 1, height: 1, shown: 1, path: "", marks: [], box: null, objects: [],
        suggestions: [], selected: -1, heat: "", negative: false, uploader: 0,
      },
      drag: null, cursor: null, corner: null, STEP,
    };
  },
  computed: {
    rect() {
      if (this.drag && this.drag.to) return this.sorted(this.drag.from, this.drag.to);
      if (this.corner && this.cursor) return this.sorted(this.corner, this.cursor);
      return this.scene.box;
    },
  },
  mounted() {
    this.observer = new ResizeObserver(() => this.measure());
    this.observer.observe(this.$refs.frame);
    this.listeners = { keydown: this.keydown, keyup: this.keyup, blur: () => (this.space = false) };
    for (const [name, listener] of Object.entries(this.listeners)) window.addEventListener(name, listener);
  },
  unmounted() {
    this.observer.disconnect();
    for (const [name, listener] of Object.entries(this.listeners)) window.removeEventListener(name, listener);
  },
  methods: {
    show(patch) {
      const other = patch.file !== undefined && patch.file !== this.scene.file;
      Object.assign(this.scene, patch);
      if (!other) return;
      this.drag = this.cursor = this.corner = null;
      this.fit();
    },
    // The newest frame wins: those that arrive after it are dropped.
    async showFrame(patch) {
      const image = new Image();
      const turn = (this.turn = (this.turn || 0) + 1);
      image.src = patch.src;
      await image.decode().catch(() => {}); // shown as broken
      if (turn === this.turn) this.show(patch);
    },
    sorted: (a, b) => [
      Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1]),
    ],
    place(event) {
      const area = this.$refs.stage.getBoundingClientRect();
      const inside = (value) => Math.min(Math.max(value, 0), 1);
      return [
        inside((event.clientX - area.left) / area.width), inside((event.clientY - area.top) / area.height),
      ];
    },
    // The mouse is back at the image, and so are the keys: Enter no more presses a button.
    enter(event) {
      const onButton = document.activeElement?.closest(BUTTONS);
      if (onButton && event.pointerType === "mouse") this.$refs.stage.focus({ preventScroll: true });
    },
    // So are they after a press of a zoom button, but for one by a key.
    leave(event) {
      if (event.detail) this.$refs.stage.focus({ preventScroll: true });
    },
    down(event) {
      this.drag = null;
      if (this.grab(event) || ![0, 2].includes(event.button)) return;
      if (!this.$refs.stage.contains(event.target)) return;
      this.cursor = this.corner = null;
      this.drag = { from: this.place(event), x: event.clientX, y: event.clientY, right: event.button === 2 };
    },
    move(event) {
      this.pull(event);
      if (!this.drag || this.drag.right) return;
      const far = Math.hypot(event.clientX - this.drag.x, event.clientY - this.drag.y) > DRAG;
      if (far || this.drag.to) this.drag.to = this.place(event);
    },
    cancel(event) {
      this.release(event);
      this.drag = null;
    },
    up(event) {
      const drag = this.drag;
      this.cancel(event);
      if (!drag) return;
      if (drag.to) this.$emit("box", { box: this.sorted(drag.from, drag.to) });
      else this.press(drag.from, drag.right);
    },
    dropped(event) {
      runMethod(this.scene.uploader, "addFiles", [event.dataTransfer.files]);
    },
    press(at, right) {
      this.$emit("press", { at: at, positive: right === this.scene.negative });
    },
    keydown(event) {
      const target = event.target;
      const typing = target.closest("input, textarea, select, [contenteditable], .q-dialog");
      if (typing && ["Enter", "Escape"].includes(event.key)) target.blur(); // back to the image
      if (typing || event.altKey || event.metaKey) return;
      if (event.ctrlKey && event.key.toLowerCase() !== "z") return;
      if (target.closest(BUTTONS) && [" ", "Enter"].includes(event.key)) return;
      if (this.type(event) || this.local(event) || this.named(event)) event.preventDefault();
    },
    // With Space held, a drag moves the image; else its release is a click at the crosshair.
    keyup(event) {
      if (event.key !== " " || !this.space) return;
      if (this.cursor && this.space !== "used") this.$emit("press", { at: this.cursor, positive: true });
      this.space = false;
    },
    type(event) {
      // Here, not by the server: what is typed next belongs to the field already.
      const field = document.querySelector(".sg-name input");
      if (event.key.toLowerCase() !== "t" || event.ctrlKey || !field) return false;
      field.focus();
      return true;
    },
    local(event) {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const step = steps[event.key];
      if (!this.scene.src || event.ctrlKey) return false;
      if (step) {
        const by = (event.shiftKey ? 0.05 : 0.005) / this.zoom;
        const at = this.cursor || this.centre;
        const moved = (i) => Math.min(Math.max(at[i] + (this.cursor ? by * step[i] : 0), 0), 1);
        this.cursor = [moved(0), moved(1)];
        this.reveal(this.cursor);
        return true;
      }
      const zoom = ZOOMS[event.key];
      if (zoom !== undefined) {
        if (zoom) this.zoomBy(zoom);
        else this.fit();
        return true;
      }
      if (event.key === " ") {
        this.space ||= true;
        return true;
      }
      if (!this.cursor) return false;
      const key = event.key.toLowerCase();
      if (key === "x") this.$emit("press", { at: this.cursor, positive: false });
      else if (key === "b" && this.corner) {
        this.$emit("box", { box: this.sorted(this.corner, this.cursor) });
        this.corner = null;
      } else if (key === "b") this.corner = this.cursor;
      else return false;
      return true;
    },
    named(event) {
      if (event.key === "Escape") this.cursor = this.corner = this.drag = null;
      const keys = "z r n f h e k j l m d p v o . , < > ? home end enter escape backspace delete pagedown pageup 1 2 3 4 5 6 7 8 9";
      const key = event.key.toLowerCase();
      if (!keys.split(" ").includes(key)) return false;
      this.$emit("key", { key: key, shift: event.shiftKey, repeat: event.repeat });
      return true;
    },
  },
};
