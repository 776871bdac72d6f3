window.MathJax = {
  jax: ["input/TeX", "output/HTML-CSS"],
  "HTML-CSS": { availableFonts: [], preferredFont: null, webFont: "STIX-Web" },
  tex2jax: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processClass: "arithmatex", ignoreClass: ".*|" },
  messageStyle: "none",
  showMathMenu: false,
};
