/** Elements without HTML: what users and files say is always text. */

const STYLES = new URL("../sefi_library.css", import.meta.url).href

/** An element with properties (`className`, `textContent`, ...) and children. */
export function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties)
    made.append(...children.filter((child) => child != null))
    return made
}

/** A piece of text, which may be anything, as an element of a class. */
export function label(className, textContent, tag = "span") {
    return element(tag, { className, textContent })
}

/** An icon of the frontend's own font, such as "copy"; nothing for those who cannot see it. */
export function icon(name) {
    return element("span", { className: `pi pi-${name}`, ariaHidden: "true" })
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
