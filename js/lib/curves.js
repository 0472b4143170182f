/** Small line charts of losses, as SVG elements. */

import { element } from "./elements.js"
import { say } from "./texts.js"

const POINTS = 120
const WIDTH = 200
const HEIGHT = 40
const SVG = "http://www.w3.org/2000/svg"

/**
 * The means of neighbouring values, so that there are at most as many as can be seen.
 *
 * @param {number[]} values
 * @param {number} most
 * @returns {number[]}
 */
export function bucketMeans(values, most) {
    const size = Math.ceil(values.length / most)
    if (size <= 1) return values
    const means = []
    for (let start = 0; start < values.length; start += size) {
        const bucket = values.slice(start, start + size)
        means.push(bucket.reduce((sum, value) => sum + value, 0) / bucket.length)
    }
    return means
}

/**
 * Every value as the mean of itself and its neighbours: losses jump from step to step.
 *
 * @param {number[]} values
 * @param {number} reach neighbours on each side
 * @returns {number[]}
 */
export function smoothed(values, reach) {
    return values.map((_, index) => {
        const around = values.slice(Math.max(0, index - reach), index + reach + 1)
        return around.reduce((sum, value) => sum + value, 0) / around.length
    })
}

/**
 * @param {number} value of a loss
 * @returns {string} of at most five characters or so
 */
function shortly(value) {
    return value.toFixed(value < 10 ? 3 : value < 100 ? 1 : 0)
}

/**
 * @param {string} tag
 * @param {Object<string, string>} attributes
 * @returns {SVGElement}
 */
function drawn(tag, attributes) {
    const made = document.createElementNS(SVG, tag)
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
    return made
}

/** One chart with its name and newest value; what was measured is faint, its course is strong. */
export class Curve {
    /** @param {string} name of the loss */
    constructor(name) {
        const loss = element("span", { className: "sefi-wide", textContent: say(" loss") })
        this.number = element("span", { className: "sefi-number" })
        const label = element("div", { className: "sefi-label" })
        label.append(element("span", {}, say(name), loss), this.number)
        this.raw = drawn("polyline", { class: "sefi-raw" })
        this.course = drawn("polyline", { class: "sefi-course" })
        const whole = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" }
        const chart = drawn("svg", { ...whole, role: "img", "aria-label": say(name) + say(" loss") })
        chart.append(this.raw, this.course)
        const title = say("The {name} loss of every step, and its course", { name: say(name) })
        this.element = element("div", { className: "sefi-curve", title }, label, chart)
    }

    /**
     * @param {number[]} losses the newest is of `step`
     * @param {number} step
     * @param {number} steps where the chart's right edge is; it begins at 0 steps and 0 loss
     */
    show(losses, step, steps) {
        const off = losses.length > 0 && losses.every((loss) => loss === 0)
        this.element.hidden = off
        if (off || !losses.length) {
            for (const line of [this.raw, this.course]) line.removeAttribute("points")
            this.number.textContent = ""
            return
        }
        const values = bucketMeans(losses, POINTS)
        const top = Math.max(...values) || 1
        const first = Math.max(0, step - losses.length)
        const place = (value, index) => {
            const at = first + ((index + 1) / values.length) * losses.length
            const height = HEIGHT - 1 - (value / top) * (HEIGHT - 3)
            return `${((at / steps) * WIDTH).toFixed(1)},${height.toFixed(1)}`
        }
        const course = smoothed(values, Math.ceil(values.length / 12))
        this.raw.setAttribute("points", values.map(place).join(" "))
        this.course.setAttribute("points", course.map(place).join(" "))
        this.number.textContent = shortly(course.at(-1))
    }
}
