/** What the user is told in toasts, and what is brought up to date after a run. */
import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { loadStyles } from "./lib/elements.js"
import { inputsOf, places, valueOf } from "./lib/graph.js"
import { APPLY, identitiesOfGraph, namesInClip, placeWithId } from "./lib/identities.js"
import { identityFiles, isName } from "./lib/library.js"
import { say } from "./lib/texts.js"

const ERROR = "sefi_ide.SeFiError"
const SAVE = "SeFiSaveIdentity"
/** Their texts are no prompts for the CLIP that is connected to them. */
const NO_PROMPTS = [APPLY, "SeFiTrainIdentity", "SeFiPromptScore"]
const WARNING_MILLISECONDS = 12000
const ERROR_MILLISECONDS = 20000
/** How long the frontend's message takes to be in its place. */
const OVERLAY_MILLISECONDS = 400
const CHECK_MILLISECONDS = 250
const TOAST_GAP = 8

const toasts = new Map()

/** A toast, in place of one that says the same already; returns it. */
function tell(severity, summary, detail, life, styleClass = "") {
    const toast = { severity, summary, detail, life, styleClass }
    const key = JSON.stringify(toast)
    if (toasts.has(key)) app.extensionManager.toast.remove(toasts.get(key))
    toasts.set(key, toast)
    app.extensionManager.toast.add(toast)
    return toast
}

/** The sentence of an error that the user can put right; the frontend says that there is one. */
async function onError({ detail: error }) {
    if (error.exception_type !== ERROR) return
    // Without its panel of errors the frontend opens a dialog, which has the sentence.
    if (!app.extensionManager.setting.get("Comfy.RightSidePanel.ShowErrorsTab")) return
    const sentence = error.exception_message.trim()
    const [node, rest] = /^(SeFi [A-Z][A-Za-z ]*): (.+)$/s.exec(sentence)?.slice(1) ?? []
    const overlay = await overlayOfError()
    const detail = rest ? rest[0].toLocaleUpperCase() + rest.slice(1) : sentence
    const toast = tell("error", node ?? "SeFi-IDE", detail, ERROR_MILLISECONDS, "sefi-below")
    if (overlay) leaveWith(overlay, toast)
}

/** The frontend's own message of an error, if it has one. Toasts that come leave it free. */
async function overlayOfError() {
    await new Promise((resolve) => setTimeout(resolve, OVERLAY_MILLISECONDS))
    const overlay = document.querySelector("[data-testid=error-overlay]")
    const { bottom = 0 } = overlay?.getBoundingClientRect() ?? {}
    const { top = 0 } = document.querySelector(".p-toast-top-right")?.getBoundingClientRect() ?? {}
    const room = overlay ? Math.max(0, bottom - top + TOAST_GAP) : 0
    document.documentElement.style.setProperty("--sefi-below", `${room}px`)
    return overlay
}

/** Take a toast away as soon as the frontend's message is: closed, opened, or run again. */
function leaveWith(overlay, toast) {
    const check = setInterval(() => {
        if (overlay.isConnected) return
        clearInterval(check)
        app.extensionManager.toast.remove(toast)
    }, CHECK_MILLISECONDS)
    setTimeout(() => clearInterval(check), toast.life)
}

/** Words of a text that stand like placeholders, without other packs' tags. */
function wordsIn(text) {
    return [...text.matchAll(/<([^<>]+)>/g)]
        .map(([, word]) => word.normalize("NFC"))
        .filter((word) => isName(word) && !text.includes(`</${word}>`))
}

/** `[{ place, words, names }]`: prompts with words that no identity of their CLIP has. */
async function unknownWords() {
    const found = []
    for (const place of places()) {
        const clips = inputsOf(place, "CLIP")
        if (clips.length !== 1 || NO_PROMPTS.includes(place.node.type)) continue
        const texts = inputsOf(place, "STRING").map(({ name }) => valueOf(place, name))
        const words = new Set(texts.filter((text) => typeof text === "string").flatMap(wordsIn))
        if (!words.size) continue
        const names = await namesInClip(place, clips[0].index)
        if (!names?.length) continue
        const unknown = [...words].filter((word) => !names.includes(word))
        if (unknown.length) found.push({ place, words: unknown, names })
    }
    return found
}

async function warnOfUnknownWords() {
    const prompts = await unknownWords()
    if (!prompts.length) return
    const graph = (await identitiesOfGraph()).map(({ name }) => name.normalize("NFC"))
    for (const { words, names } of prompts)
        for (const word of words) {
            const summary = say("{it} is no identity here", { it: `<${word}>` })
            tell("warn", summary, remedy(word, names, graph), WARNING_MILLISECONDS)
        }
}

function remedy(word, names, graph) {
    const list = names.map((name) => `<${name}>`).join(", ")
    const known = say("It is read as plain text. Known: {names}.", { names: list })
    const same = names.find((name) => name.toLocaleLowerCase() === word.toLocaleLowerCase())
    if (same)
        return say("Did you mean {it}? Upper and lower case count.", { it: `<${same}>` })
    if (!graph.includes(word)) return known
    const where = "It is in the graph, but its SeFi Apply Identity does not lead to this prompt."
    return `${say(where)} ${known}`
}

let files = null

async function filesNow() {
    return JSON.stringify(await identityFiles(0))
}

/** Let the lists of the graph know identity files that a run has saved. */
async function refreshIfSaved() {
    const now = await filesNow()
    if (now === files) return
    files = now
    // Reads the lists anew without toasts, which the other does with them.
    if (app.reloadNodeDefs) await app.reloadNodeDefs()
    else await app.refreshComboInNodes()
    await app.refreshMissingModels?.({ reloadDefs: false, silent: true })
}

/** The run may belong to a workflow that is not open any more, whose nodes are not known. */
function onExecuted({ detail }) {
    const place = placeWithId(detail.node)
    if (!place || place.node.type === SAVE) void refreshIfSaved()
}

app.registerExtension({
    name: "SeFi.Notices",
    setup() {
        loadStyles()
        api.addEventListener("execution_error", onError)
        api.addEventListener("promptQueueing", () => void warnOfUnknownWords())
        api.addEventListener("executed", onExecuted)
        // Not awaited: the frontend would wait for a folder that may be slow.
        void filesNow().then((now) => (files = now))
    },
})
