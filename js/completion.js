/**
 * Typing `<` in a prompt completes the placeholders of the identities.
 *
 * Everything listens on the document, and what is chosen is typed into the field, so that it works
 * in every place that has a text field: both kinds of nodes, subgraphs, side panels and App Mode.
 */
import { app } from "../../scripts/app.js"
import { caretPosition } from "./lib/caret.js"
import { element, face, label, loadStyles } from "./lib/elements.js"
import { identitiesOfGraph } from "./lib/identities.js"
import { library } from "./lib/library.js"
import { say } from "./lib/texts.js"

const SETTING = "SeFi.Completion"
/** Text fields for prompts: not searches, names of files or numbers. */
const FIELDS = "textarea, .graphdialog input[type=text], .lg-node input[type=text]"
/** A placeholder that is begun before the caret. `<lora:` and `a < b` are none. */
const BEGUN = /<([\p{L}\p{M}\p{N}_\-\u200c\u200d]{0,64})$/u
/** What is left of a placeholder behind the caret that stands in it. */
const REST = /^[\p{L}\p{M}\p{N}_\-\u200c\u200d]{0,64}>/u
const INSERTED = "insertReplacementText"
const SHOWN = 50
const GAP = 4
const MARGIN = 8

/** The open list: `{ field, start, query, identities, options, chosen }`, or null. */
let open = null
let asked = 0
const list = element("ul", {
    className: "sefi-completion",
    role: "listbox",
    id: "sefi-completion",
})

function isField(target) {
    const isOne = target instanceof HTMLElement && target.matches(FIELDS)
    return isOne && !target.readOnly && !target.disabled
}

function begunIn(field) {
    const { value, selectionStart: end } = field
    if (end === null || end !== field.selectionEnd) return null
    const found = BEGUN.exec(value.slice(0, end))
    return found && { start: found.index, query: found[1].normalize("NFC").toLocaleLowerCase() }
}

/** Open, renew or close the list for what is typed in a field. */
async function look(field) {
    const question = ++asked
    if (!begunIn(field)) return close()
    if (open) show(field, open.identities) // at once: a key may follow before the answers
    const graph = await identitiesOfGraph()
    const inGraph = graph.map((identity) => ({ ...identity, inGraph: true }))
    if (question === asked && !open) show(field, inGraph)
    const others = await library()
    if (question !== asked) return
    const byFile = new Map(others.map((identity) => [identity.file, identity]))
    const used = new Set(graph.map(({ name }) => name))
    const rest = [...new Map(others.map((one) => [one.name, one])).values()]
        .filter(({ name }) => !used.has(name))
        .sort((one, other) => one.name.localeCompare(other.name))
    show(field, [...inGraph.map((one) => ({ ...byFile.get(one.file), ...one })), ...rest])
}

function show(field, identities) {
    const begun = begunIn(field)
    if (!begun || document.activeElement !== field) return close()
    const found = identities
        .map((identity) => [identity.name.toLocaleLowerCase().indexOf(begun.query), identity])
        .filter(([at]) => at >= 0)
    const [begin, have] = [found.filter(([at]) => !at), found.filter(([at]) => at)]
    const options = [...begin, ...have].map(([, identity]) => identity).slice(0, SHOWN)
    if (!options.length) return close()
    const before = open?.field === field ? open.options[open.chosen]?.name : undefined
    if (open && open.field !== field) close()
    const same = begun.query === open?.query
    const chosen = Math.max(0, same ? options.findIndex(({ name }) => name === before) : 0)
    open = { field, ...begun, identities, options, chosen }
    list.ariaLabel = say("Identities")
    list.replaceChildren(...options.map(row))
    if (!list.isConnected) document.body.append(list)
    field.setAttribute("aria-controls", list.id)
    field.setAttribute("aria-expanded", "true")
    place()
    choose(open.chosen)
}

function row({ name, classWord, file, picture, inGraph }, index) {
    const where = inGraph ? "in this graph" : file.replace(/\.safetensors$/i, "")
    const mark = inGraph ? "sefi-completion-where sefi-in-graph" : "sefi-completion-where"
    const option = element(
        "li",
        { className: "sefi-completion-option", role: "option", id: `sefi-completion-${index}` },
        face(picture, "sefi-completion-face"),
        label("sefi-placeholder", `<${name}>`, "code"),
        label("sefi-completion-word", classWord ?? ""),
        label(mark, where)
    )
    option.title = inGraph ? `<${name}>` : `<${name}> of models/sefi: use SeFi Load Identity for it`
    option.addEventListener("pointermove", () => choose(index, false))
    option.addEventListener("click", () => insert(index))
    return option
}

/** Below the line of the placeholder, or above it where there is no room. */
function place() {
    const { left, top, bottom } = caretPosition(open.field, open.start)
    const { width, height } = list.getBoundingClientRect()
    const above = bottom + GAP + height > innerHeight - MARGIN && top - GAP - height > MARGIN
    list.style.left = `${Math.max(MARGIN, Math.min(left, innerWidth - width - MARGIN))}px`
    list.style.top = `${above ? top - GAP - height : bottom + GAP}px`
}

function choose(index, scroll = true) {
    open.chosen = (index + open.options.length) % open.options.length
    for (const [at, option] of [...list.children].entries())
        option.setAttribute("aria-selected", String(at === open.chosen))
    open.field.setAttribute("aria-activedescendant", `sefi-completion-${open.chosen}`)
    if (scroll) list.children[open.chosen].scrollIntoView({ block: "nearest" })
}

function close() {
    if (!open) return
    for (const name of ["aria-controls", "aria-expanded", "aria-activedescendant"])
        open.field.removeAttribute(name)
    open = null
    list.remove()
}

function insert(index) {
    const { field, start, options } = open
    const end = field.selectionEnd
    const [rest] = REST.exec(field.value.slice(end)) ?? [""]
    close()
    asked++
    field.focus()
    field.setRangeText(`<${options[index].name}>`, start, end + rest.length, "end")
    field.dispatchEvent(new InputEvent("input", { bubbles: true, inputType: INSERTED }))
}

const KEYS = {
    ArrowDown: () => choose(open.chosen + 1),
    ArrowUp: () => choose(open.chosen - 1),
    Enter: () => insert(open.chosen),
    Tab: () => insert(open.chosen),
    Escape: () => {
        asked++
        close()
    },
}

function onKeyDown(event) {
    const modified = event.ctrlKey || event.metaKey || event.altKey || event.shiftKey
    if (!open || event.target !== open.field || event.isComposing || modified) return
    if (!Object.hasOwn(KEYS, event.key)) return
    // Only now are these keys the list's, and not those of the field or of others who listen.
    event.preventDefault()
    event.stopImmediatePropagation()
    KEYS[event.key]()
}

function onInput(event) {
    if (event.inputType === INSERTED || event.isComposing) return
    if (!isField(event.target) || !app.extensionManager.setting.get(SETTING)) return
    void look(event.target)
}

/** The caret has been moved out of the placeholder, or the canvas under the list. */
function onMoved(event) {
    if (open && !list.contains(event.target) && begunIn(open.field)?.start !== open.start) close()
}

function onGone(event) {
    if (open && !list.contains(event.target)) close()
}

app.registerExtension({
    name: "SeFi.Completion",
    settings: [
        {
            id: SETTING,
            category: ["SeFi-IDE", "Prompts", "Completion"],
            name: "Complete placeholders of identities when < is typed in a prompt",
            tooltip: "Lists the identities of the graph and those of models/sefi.",
            type: "boolean",
            defaultValue: true,
            onChange: close,
        },
    ],
    setup() {
        loadStyles()
        // The field keeps the focus, and a dialog around it takes no click as outside of it.
        for (const type of ["pointerdown", "mousedown"])
            list.addEventListener(type, (event) => {
                event.preventDefault()
                event.stopPropagation()
            })
        window.addEventListener("keydown", onKeyDown, { capture: true })
        document.addEventListener("input", onInput, { capture: true })
        document.addEventListener("selectionchange", onMoved)
        document.addEventListener("focusout", onGone, { capture: true })
        document.addEventListener("pointerdown", onGone, { capture: true })
        for (const type of ["wheel", "scroll"])
            document.addEventListener(type, onGone, { capture: true, passive: true })
        window.addEventListener("resize", close)
    },
})
