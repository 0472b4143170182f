/** The card on SeFi Load Identity: whom the chosen file holds, before anything is run. */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { element, face, icon, label, loadStyles } from "./lib/elements.js"
import { valueOf } from "./lib/graph.js"
import { appliersOf, checkpointOf, placeOf } from "./lib/identities.js"
import { FAMILIES, identityFiles, identityOf, metadataOf } from "./lib/library.js"
import { say } from "./lib/texts.js"

const NODE = "SeFiLoadIdentity"
const HEIGHT = 108
const COPIED_MILLISECONDS = 1500

/** How checkpoints name their architecture (modelspec, and kohya's trainers). */
const ARCHITECTURES = [
    [/^(stable-diffusion-v1|sd_v1)/, "sd1"],
    [/^(stable-diffusion-v2|sd_v2)/, "sd2"],
    [/^(stable-diffusion-xl(?!.*refiner)|sdxl_base)/, "sdxl"],
]

const cards = new Map()

/** Put the card on a node; it follows the node's widgets from then on. */
function addCard(node) {
    loadStyles()
    const card = element("div", { className: "sefi-card" })
    const widget = node.addDOMWidget("identity_card", "sefi_identity_card", card, {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: () => HEIGHT,
        getMaxHeight: () => HEIGHT,
        getValue: () => "",
    })
    widget.serialize = false // not among the saved values of the widgets
    cards.set(node, { card, asked: 0, shown: "" })
    for (const name of ["file", "name"]) {
        const input = node.widgets.find((one) => one.name === name)
        const { callback } = input ?? {}
        if (input)
            input.callback = function (...values) {
                const result = callback?.apply(this, values)
                void update(node)
                return result
            }
    }
    const { onRemoved } = node
    node.onRemoved = function (...values) {
        cards.delete(node)
        return onRemoved?.apply(this, values)
    }
    makeRoom(node)
    void update(node)
}

/** A classic node does not grow by itself for what is added to it; Nodes 2.0 do. */
function makeRoom(node) {
    const [width, height] = node.size
    const needed = node.computeSize()[1]
    if (!LiteGraph.vueNodesMode && height < needed) node.setSize([width, needed])
}

function updateAll() {
    for (const node of cards.keys()) void update(node)
}

/** Draw a node's card anew if what it shows has changed. */
async function update(node) {
    const state = cards.get(node)
    if (!state) return
    const asked = ++state.asked
    await Promise.resolve() // a node that is being loaded has its values in a moment
    const place = placeOf(node) ?? { node, hosts: [] }
    const [file, name] = [valueOf(place, "file"), valueOf(place, "name")]
    const identity = typeof file === "string" && file ? await identityOf(file) : null
    const renamed = identity && name ? { ...identity, placeholder: `<${name}>` } : identity
    const mismatch = identity ? await mismatchOf(node, identity.family) : null
    // Answers come in any order, and only the newest question counts.
    if (asked !== state.asked) return
    const shown = JSON.stringify([file, renamed, mismatch])
    if (shown === state.shown) return
    state.shown = shown
    state.card.classList.toggle("sefi-mismatch", Boolean(mismatch))
    state.card.replaceChildren(...(renamed ? drawn(renamed, mismatch) : nobody(file)))
}

/** The first checkpoint of another family that an identity goes to: `{ file, family }`, or null. */
async function mismatchOf(node, family) {
    for (const place of appliersOf(node)) {
        const checkpoint = checkpointOf(place)
        const metadata = checkpoint && (await metadataOf(checkpoint.folder, checkpoint.file))
        const said = metadata?.["modelspec.architecture"] ?? metadata?.ss_base_model_version
        const [, found] = ARCHITECTURES.find(([pattern]) => pattern.test(said ?? "")) ?? []
        if (found && found !== family) return { file: checkpoint.file, family: labelOf(found) }
    }
    return null
}

function labelOf(family) {
    return Object.hasOwn(FAMILIES, family) ? FAMILIES[family] : family
}

function drawn(identity, mismatch) {
    const { placeholder, classWord, family, steps, date, ofFile, picture } = identity
    const when = date && label("", date.toLocaleDateString(undefined, { dateStyle: "medium" }))
    if (when) when.title = say(ofFile ? "File of {when}" : "Learned on {when}", {
            when: date.toLocaleString(),
        })
    const facts = [when, steps && say(steps === 1 ? "1 step" : `${steps} steps`)]
    const text = element(
        "div",
        { className: "sefi-card-text" },
        element(
            "div",
            { className: "sefi-card-head" },
            label("sefi-placeholder", placeholder, "code"),
            copyButton(placeholder)
        ),
        line([classWord, labelOf(family)]),
        mismatch ? warning(mismatch, labelOf(family)) : line(facts)
    )
    return [face(picture, "sefi-card-face"), text]
}

function warning({ file, family }, own) {
    const text = say("Does not fit: the checkpoint is {family}", { family })
    const title = say("Learned on {own}, but {file} is {family}", { own, file, family })
    const properties = { className: "sefi-card-warning", title, role: "alert" }
    return element("div", properties, icon("exclamation-triangle"), text)
}

function line(parts) {
    const row = element("div", { className: "sefi-card-line" })
    parts.filter(Boolean).forEach((part, index) => row.append(index ? " · " : "", part))
    row.title = row.textContent
    return row
}

function nobody(file) {
    const textContent = say(
        file
            ? "This file is no identity, or is not in models/sefi."
            : "Save an identity with SeFi Save Identity, then choose it here.",
    )
    const text = label("sefi-card-text sefi-card-line sefi-card-nobody", textContent, "div")
    return [face("", "sefi-card-face"), text]
}

function copyButton(text) {
    const done = element("span", { className: "sefi-card-copied", role: "status" })
    const title = say("Copy {it}", { it: text })
    const properties = { type: "button", className: "sefi-card-copy", title, ariaLabel: title }
    const button = element("button", properties, icon("copy"), done)
    button.addEventListener("click", async () => {
        if (!(await copy(text))) return
        button.firstChild.replaceWith(icon("check"))
        done.textContent = say("Copied")
        setTimeout(() => {
            button.firstChild.replaceWith(icon("copy"))
            done.textContent = ""
        }, COPIED_MILLISECONDS)
    })
    return button
}

async function copy(text) {
    try {
        await navigator.clipboard.writeText(text)
        return true
    } catch {
        // Browsers have no clipboard for pages of http:// addresses, but for those of this machine.
        const field = element("textarea", { value: text, className: "sefi-offscreen" })
        document.body.append(field)
        field.select()
        const copied = document.execCommand("copy")
        field.remove()
        return copied
    }
}

app.registerExtension({
    name: "SeFi.IdentityCard",
    setup() {
        api.addEventListener("graphChanged", updateAll)
    },
    nodeCreated(node) {
        if (node.comfyClass === NODE) addCard(node)
    },
    loadedGraphNode(node) {
        if (node.comfyClass !== NODE) return
        makeRoom(node)
        void update(node)
    },
    afterConfigureGraph: updateAll,
    async refreshComboInNodes() {
        await identityFiles(0)
        updateAll()
    },
})
