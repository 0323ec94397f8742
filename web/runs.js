// Which of the open workflows a run is of. What the server tells during a run names nodes by their ids, under which every
// other workflow has other nodes.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { isOurs } from "./node_families.js";

const MOST = 1000; // runs that wait and are remembered

const waiting = new Map(); // by the id of the run
let run = null; // the one whose messages come now: { workflow, graph, key, ours }

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

// The node that an execution id such as "5", or "12:5" inside a subgraph, speaks of.
export function nodeOf(id) {
  let graph = rootGraph();
  let node = null;
  for (const part of String(id).split(":")) {
    if (!graph) return null;
    node = graph.getNodeById(part) ?? graph.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

function* everyNode(graph = rootGraph(), path = "") {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    const id = `${path}${node.id}`;
    yield [id, node];
    if (node.subgraph) yield* everyNode(node.subgraph, `${id}:`);
  }
}

// Each of our nodes in the open workflow, with its execution id.
export function ourNodes() {
  return [...everyNode()].filter(([, node]) => isOurs(node));
}

function graphId() {
  const id = rootGraph()?.id ?? "";
  return /[1-9a-f]/.test(id) ? id : null;
}

// The names under which what became of the open workflow's nodes is kept: the id of its graph; for one without (opened from
// an API prompt, it gets its id later) what it is made of.
export function graphKeys() {
  const made = [...everyNode()].map(([id, node]) => `${id} ${node.type}`).sort().join(", ");
  const id = graphId();
  return id === null ? [made] : [id, made];
}

function openWorkflow() {
  return app.extensionManager?.workflow?.activeWorkflow;
}

function thisWorkflow() {
  const ours = new Map(ourNodes().map(([id, node]) => [id, node.type]));
  return { workflow: openWorkflow(), graph: graphId(), key: graphKeys()[0], ours };
}

// The run that goes on when its workflow is not the open one, else null: { key, ours }, where `key` is one of graphKeys() and
// `ours` has the types of our nodes by their ids.
export function runElsewhere() {
  if (run === null) return null;
  // Graph and workflow change one after the other.
  const here = run.workflow === openWorkflow() && (run.graph === null || run.graph === graphId());
  return here ? null : run;
}

// To be called with the detail of "execution_start", and of whatever ends a run.
export function runStarts({ prompt_id: id } = {}) {
  run = waiting.get(id) ?? thisWorkflow(); // it can start before the server's answer has told its id
}

export function runEnds({ prompt_id: id } = {}) {
  waiting.delete(id);
  run = null;
}

// The front end tells nobody which workflow became which run.
const { queuePrompt } = api;
if (typeof queuePrompt === "function") {
  api.queuePrompt = async function (...given) {
    const asked = thisWorkflow();
    const answer = await queuePrompt.apply(this, given);
    if (answer?.prompt_id !== undefined) waiting.set(answer.prompt_id, asked);
    if (waiting.size > MOST) waiting.delete(waiting.keys().next().value);
    return answer;
  };
}
