/** Elements without HTML: what users and files say is always text. */

const STYLES = new URL("../sefi_library.css", import.meta.url).href

/** An element with properties (`className`, `textContent`, ...) and children. */
export function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties)
    made.append(...children.filter((child) => child != null))
    return made
}

/** Load the styles of the library's parts, once. */
export function loadStyles() {
    if (document.querySelector(`link[href="${STYLES}"]`)) return
    document.head.append(element("link", { rel: "stylesheet", href: STYLES }))
}

/** A face, or a drawn head where there is none. */
export function face(picture, className) {
    const frame = element("span", { className: `sefi-face ${className}`, ariaHidden: "true" })
    if (picture) frame.append(element("img", { src: picture, alt: "", draggable: false }))
    else frame.classList.add("pi", "pi-user")
    return frame
}
