/** Where the caret of a text field is on the screen. */
import { element } from "./elements.js"

const COPIED = [
    "boxSizing", "width", "borderTopWidth", "borderRightWidth", "borderBottomWidth",
    "borderLeftWidth", "paddingTop", "paddingRight", "paddingBottom", "paddingLeft", "fontFamily",
    "fontSize", "fontStyle", "fontWeight", "fontStretch", "fontVariant", "letterSpacing",
    "wordSpacing", "lineHeight", "tabSize", "textAlign", "textIndent", "textTransform", "direction",
]

/**
 * The line of a character of a textarea or an input, in pixels of the window: its `left`, `top` and
 * `bottom`. The field may be scaled, as nodes are by the zoom of the canvas.
 */
export function caretPosition(field, index) {
    const style = getComputedStyle(field)
    const mirror = element("div")
    for (const property of COPIED) mirror.style[property] = style[property]
    Object.assign(mirror.style, {
        position: "fixed",
        left: "-9999px",
        top: "0",
        visibility: "hidden",
        borderStyle: "solid",
        overflow: "hidden",
        whiteSpace: field.tagName === "TEXTAREA" ? "pre-wrap" : "pre",
        overflowWrap: "break-word",
    })
    const marker = element("span", { textContent: field.value.slice(index, index + 1) || "." })
    mirror.append(field.value.slice(0, index), marker)
    document.body.append(mirror)
    const { offsetLeft, offsetTop, offsetHeight } = marker
    mirror.remove()
    const box = field.getBoundingClientRect()
    const scale = box.width / (field.offsetWidth || 1)
    // The text of an input stands in its middle.
    const y = field.tagName === "TEXTAREA" ? offsetTop : (field.offsetHeight - offsetHeight) / 2
    const top = box.top + (y - field.scrollTop) * scale
    return {
        left: box.left + (offsetLeft - field.scrollLeft) * scale,
        top: Math.max(top, box.top),
        bottom: Math.min(top + offsetHeight * scale, box.bottom),
    }
}
