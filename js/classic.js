/**
 * Advanced inputs fold away in classic nodes too, as they do in Nodes 2.0.
 *
 * The schema says `advanced` in the options of a widget, where only Nodes 2.0 looks; classic nodes
 * look at the widget itself, and leave room for it as long as it is not hidden. Both follow the
 * node's "Show Advanced" here. An input that is connected is always shown, as Nodes 2.0 does.
 * Classic nodes offer it in their menu only, so that they get a button, like that of Nodes 2.0.
 */
import { app } from "../../scripts/app.js"
import { say } from "./lib/texts.js"

const PREFIX = "SeFi"
/** Pixels that a field of several lines gets beyond its least height. */
const TEXT_ROOM = 40
const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets"

function alwaysShown() {
    return Boolean(app.extensionManager.setting.get(ALWAYS))
}

function fold(node, widget) {
    let hidden = widget.hidden
    const isAdvanced = () =>
        !node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null) &&
        !alwaysShown()
    Object.defineProperties(widget, {
        advanced: { configurable: true, enumerable: true, get: isAdvanced, set() {} },
        hidden: {
            configurable: true,
            enumerable: true,
            get: () => hidden || (!node.showAdvanced && isAdvanced()),
            set: (value) => (hidden = value),
        },
    })
}

function addButton(node) {
    const toggle = () => node.toggleAdvanced()
    const options = { serialize: false, canvasOnly: true }
    const button = node.addWidget("button", "advanced_inputs", null, toggle, options)
    button.serialize = false // not among the saved values of the widgets
    Object.defineProperties(button, {
        label: {
            configurable: true,
            get: () => say(node.showAdvanced ? "Hide advanced inputs" : "Show advanced inputs"),
            set() {},
        },
        hidden: { configurable: true, get: alwaysShown, set() {} },
    })
}

/** Give back what opening has taken, unless the user has made the node larger since. */
function shrinkWhenFolded(node) {
    const { toggleAdvanced } = node
    let folded = null
    let opened = null
    node.toggleAdvanced = function (...values) {
        const height = this.size[1]
        const result = toggleAdvanced.apply(this, values)
        if (this.showAdvanced) {
            folded = height
            opened = this.size[1]
        } else if (height === opened) {
            this.setSize([this.size[0], Math.max(folded, this.computeSize()[1])])
        }
        return result
    }
}

app.registerExtension({
    name: "SeFi.ClassicAdvanced",
    nodeCreated(node) {
        if (!node.comfyClass?.startsWith(PREFIX)) return
        const advanced = (node.widgets ?? []).filter((widget) => widget.options?.advanced)
        if (!advanced.length) return
        for (const widget of advanced) fold(node, widget)
        addButton(node)
        shrinkWhenFolded(node)
        // Only a new node: a saved one gets its saved size right after this.
        if (LiteGraph.vueNodesMode) return
        const isText = (widget) => widget.element?.tagName === "TEXTAREA" && !widget.hidden
        const room = node.widgets.filter(isText).length * TEXT_ROOM
        node.setSize([node.size[0], node.computeSize()[1] + room])
    },
})
