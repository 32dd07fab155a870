// Where the objects of a video are seen: a row per object, a bar per range of frames, a dot per prompt.
export default {
  template: `
    <svg class="sg-rows" :viewBox="'0 0 ' + count + ' ' + Math.max(rows.length, 1)" preserveAspectRatio="none"
         :style="{ height: 7 * Math.min(rows.length, 8) + 'px' }" aria-hidden="true" @click="seek">
      <template v-for="(row, i) in rows" :key="row.id">
        <rect v-for="(range, j) in row.absent" :key="'a' + j" :x="range[0]" :width="range[1] - range[0] + 1"
              :y="i + 0.4" height="0.15" :fill="row.colour" />
        <rect v-for="(range, j) in row.ranges" :key="j" :x="range[0]" :width="range[1] - range[0] + 1"
              :y="i + 0.15" height="0.7" :fill="row.colour" data-testid="range" />
        <rect v-for="frame in row.prompts" :key="'p' + frame" :x="frame + 0.5 - wide / 2" :width="wide"
              :y="i" height="1" fill="white" />
      </template>
    </svg>
  `,
  data: () => ({ count: 1, rows: [] }),
  computed: {
    wide() {
      return Math.max(this.count / 200, 0.3); // of a prompt, in frames
    },
  },
  methods: {
    show(patch) {
      Object.assign(this.$data, patch);
    },
    seek(event) {
      const area = event.currentTarget.getBoundingClientRect();
      const frame = Math.floor((this.count * (event.clientX - area.left)) / area.width);
      this.$emit("seek", { frame: Math.min(Math.max(frame, 0), this.count - 1) });
    },
  },
};
