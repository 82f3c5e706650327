// Search, where the site is opened from a folder: browsers refuse a Worker to pages without a server, so its script
// runs in a hidden frame instead. The theme takes such a Worker where one of this name is there before its own script.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.worker = this;
      frame.srcdoc = "<script>window.postMessage = (data) => frameElement.worker.dispatchEvent("
        + `new parent.MessageEvent("message", { data }));<\/script><script src="${url}"><\/script>`;
      frame.addEventListener("load", () => {
        this.frame = frame.contentWindow;
        for (const data of this.waiting) this.postMessage(data);
      });
      document.body.append(frame);
    }
    postMessage(data) {
      if (this.frame) this.frame.dispatchEvent(new this.frame.MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
    terminate() {}
  };
}
