/** The panel on SeFi Train Identity, with which one watches a training and stops it. */

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { TrainingView } from "./lib/training_view.js"
import { executionIds, merged } from "./lib/trainings.js"

const TYPE = "SeFiTrainIdentity"
const WIDGET = "sefi_training"
const RESTARTED = "ComfyUI was restarted during the training."

/** @type {Map<string, import("./lib/trainings.js").Training>} */
const trainings = new Map()
/** Panels by their elements: nodes may be wrapped by the frontend, elements never are. */
const views = new WeakMap()

const keyOf = ({ workflow, node }) => `${workflow}\n${node}`
const rootGraph = () => app.rootGraph ?? app.graph

function addressOf({ workflow, node, pictures }, name) {
    const which = new URLSearchParams({ workflow, node, name, version: pictures[name] })
    return api.apiURL(`/sefi/training/picture?${which}`)
}

async function stop({ workflow, node, prompt_id }) {
    try {
        const answer = await api.fetchApi("/sefi/training/stop", {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify({ workflow, node, prompt_id }),
        })
        if (answer.ok) return ""
        return (await answer.json()).error
    } catch {
        return "ComfyUI does not answer."
    }
}

function viewOf(node) {
    return views.get(node.widgets?.find((widget) => widget.name === WIDGET)?.element)
}

/** Show every training of this workflow on its node. */
function showAll() {
    const workflow = rootGraph()?.id
    const newest = new Map()
    for (const [id, node] of executionIds(rootGraph(), TYPE)) {
        const training = trainings.get(keyOf({ workflow, node: id })) ?? null
        // A subgraph that is used twice has one panel for two trainings: the one that runs.
        if (training?.state === "running" || !newest.get(node)) newest.set(node, training)
    }
    for (const [node, training] of newest) {
        const view = viewOf(node)
        if (!view) continue
        const height = view.height(node.size[0])
        view.show(training)
        // A node on the canvas makes room for it when it is drawn; elsewhere its elements do.
        if (view.height(node.size[0]) !== height) node.setDirtyCanvas(true, true)
    }
}

/** Ask the server for the trainings of the open workflow, with all their losses. */
async function ask() {
    const workflow = rootGraph()?.id
    const before = new Map(trainings)
    const answer = await api.fetchApi(`/sefi/training?${new URLSearchParams({ workflow })}`)
    if (!answer.ok) return
    const found = new Map((await answer.json()).map((training) => [keyOf(training), training]))
    for (const [key, known] of trainings) {
        if (known.workflow !== workflow || known.state !== "running" || found.has(key)) continue
        trainings.set(key, { ...known, state: "failed", message: RESTARTED })
    }
    // What an event has told in the meantime is newer than the answer.
    for (const [key, training] of found)
        if (trainings.get(key) === before.get(key)) trainings.set(key, training)
}

async function refresh() {
    showAll()
    if (!executionIds(rootGraph(), TYPE).length) return
    await ask()
    showAll()
}

/** Nodes are made by the dozen when a workflow opens, and have no ids yet. */
let due = null
function refreshSoon() {
    clearTimeout(due)
    due = setTimeout(refresh, 50)
}

async function receive({ detail }) {
    const training = merged(trainings.get(keyOf(detail)), detail)
    if (training) trainings.set(keyOf(detail), training)
    else if (detail.workflow === rootGraph()?.id) await ask()
    showAll()
}

function addStyles() {
    const link = document.createElement("link")
    link.rel = "stylesheet"
    link.href = new URL("./training_panel.css", import.meta.url).href
    document.head.append(link)
}

app.registerExtension({
    name: "sefi.training",

    setup() {
        addStyles()
        api.addEventListener("sefi.training", receive)
        api.addEventListener("reconnected", refreshSoon)
    },

    nodeCreated(node) {
        if (node.comfyClass !== TYPE) return
        const view = new TrainingView(addressOf, stop)
        const options = { serialize: false, hideOnZoom: false }
        const widget = node.addDOMWidget(WIDGET, WIDGET, view.element, options)
        widget.serialize = false
        // A fixed height: the free space of a tall node is for its texts.
        widget.computeSize = (width) => [width ?? 0, view.height(node.size[0])]
        widget.computeLayoutSize = undefined
        views.set(view.element, view)
        refreshSoon()
    },
})
