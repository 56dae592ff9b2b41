// What transformers.js makes of packed folders: tokens, or words for a mask. Runs beside its node_modules, with two
// paths: of the JSON that says what is asked, and of the JSON that answers it.
import { readFileSync, writeFileSync } from "node:fs";
import { AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, env, pipeline } from "@huggingface/transformers";

const [asked, answer] = process.argv.slice(2);
const { folder, models, texts, length: max_new_tokens, masked } = JSON.parse(readFileSync(asked, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = folder;

const tokens = [];
for (const { name, dtype } of models) {
  const kind = name === "t5" ? AutoModelForSeq2SeqLM : AutoModelForCausalLM;
  const tokenizer = await AutoTokenizer.from_pretrained(`${name}/hub`);
  const model = await kind.from_pretrained(`${name}/hub`, { dtype });
  const rows = [];
  for (const text of texts) {
    const row = await model.generate({ ...tokenizer(text), max_new_tokens, do_sample: false });
    rows.push(row.tolist()[0].map(Number));
  }
  tokens.push(rows);
}
const fill = await pipeline("fill-mask", "bert/hub", { dtype: "fp32" });
writeFileSync(answer, JSON.stringify({ tokens, filled: await fill(masked, { top_k: 3 }) }));
