// Builds the page into server/page, under fixed names, with the licences of what is in it and a record of its sources'
// hash: tests/server/test_page.py compares it with web/, so that no Node is needed to see that the build is current.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, statSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import { defineConfig } from "vite";

const here = import.meta.dirname;
const out = join(here, "..", "server", "page");
const BUNDLED = ["preact", "marked", "dompurify"];

function sources(folder) {
  return readdirSync(folder).flatMap((name) => {
    const path = join(folder, name);
    if (name === "node_modules") return [];
    return statSync(path).isDirectory() ? sources(path) : [path];
  });
}

function hashOf(paths, base) {
  const hash = createHash("sha256");
  for (const path of paths.map((path) => relative(base, path)).sort()) {
    hash.update(`${path}\0`).update(readFileSync(join(base, path))).update("\0");
  }
  return hash.digest("hex");
}

const record = {
  name: "record",
  closeBundle() {
    const licences = BUNDLED.map((name) => {
      const folder = join(here, "node_modules", name);
      const file = readdirSync(folder).find((each) => /^licen[cs]e/i.test(each));
      return `${name} ${JSON.parse(readFileSync(join(folder, "package.json"))).version}\n\n${readFileSync(join(folder, file))}`;
    });
    writeFileSync(join(out, "licenses.txt"), licences.join("\n\n"));
    const built = sources(out).filter((path) => !path.endsWith("build.json"));
    const text = JSON.stringify({ sources: hashOf(sources(here), here), built: hashOf(built, out) }, null, 1);
    writeFileSync(join(out, "build.json"), `${text}\n`);
  },
};

export default defineConfig({
  base: "/page/",
  esbuild: { jsx: "automatic", jsxImportSource: "preact", legalComments: "none" },
  build: {
    outDir: out,
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    rollupOptions: { output: { entryFileNames: "app.js", assetFileNames: "app[extname]" } },
  },
  plugins: [record],
});
