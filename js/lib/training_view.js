/** The panel's elements: what a training looks like on its node. */

import { Curve } from "./curves.js"
import { timeLeft } from "./trainings.js"

const HINT = "Run, and watch the training here."
const LOSSES = { noise: "noise loss", attention: "attention loss", leak: "leak" }
const ENDED = { finished: "learned", stopped: "stopped and kept" }

/** Heights in pixels, of the styles in training_panel.css. */
const IDLE_HEIGHT = 38
const HEIGHT_WITHOUT_PICTURES = 183
const PICTURES = { sides: 56, least: 88, most: 220 }

/**
 * @param {string} kind
 * @param {string} className
 * @param {...Node} children
 * @returns {HTMLElement}
 */
function made(kind, className, ...children) {
    const element = document.createElement(kind)
    element.className = className
    element.append(...children)
    return element
}

/** A square picture with a line of text under it. */
class Picture {
    /** @param {string} caption */
    constructor(caption) {
        this.image = made("img", "sefi-image")
        this.image.draggable = false
        this.image.hidden = true
        this.image.alt = caption
        const text = made("figcaption", "sefi-caption")
        text.textContent = caption
        this.element = made("figure", "sefi-picture", made("div", "sefi-frame", this.image), text)
    }

    /** @param {string} address empty for none */
    show(address) {
        this.image.hidden = !address
        if (address && this.image.getAttribute("src") !== address) this.image.src = address
    }
}

/** The panel of one node. */
export class TrainingView {
    /**
     * @param {(training: object, name: string) => string} addressOf a picture's
     * @param {(training: object) => Promise<string>} stop asks for it; gives why not, or ""
     */
    constructor(addressOf, stop) {
        this.addressOf = addressOf
        this.hint = made("div", "sefi-hint")
        this.hint.textContent = HINT
        this.heading = made("span", "sefi-heading")
        this.doing = made("span", "sefi-doing")
        this.place = made("span", "sefi-place")
        this.bar = made("div", "sefi-bar")
        this.progress = made("div", "sefi-progress", this.bar)
        this.progress.setAttribute("role", "progressbar")
        this.pictures = {
            photo: new Picture("photo"),
            attention: new Picture("attention"),
            preview: new Picture("preview"),
        }
        this.curves = Object.fromEntries(
            Object.entries(LOSSES).map(([name, title]) => [name, new Curve(title)]),
        )
        this.message = made("div", "sefi-message")
        this.message.setAttribute("role", "status")
        this.button = made("button", "sefi-stop")
        this.button.type = "button"
        this.button.textContent = "Stop and keep"
        this.button.title = "End the training now, and go on with what it has learned so far"
        this.button.addEventListener("click", () => this.askToStop(stop))
        const elementsOf = (parts) => Object.values(parts).map((part) => part.element)
        this.body = made(
            "div",
            "sefi-body",
            made("div", "sefi-head", this.heading, this.doing, this.place),
            this.progress,
            made("div", "sefi-pictures", ...elementsOf(this.pictures)),
            made("div", "sefi-curves", ...elementsOf(this.curves)),
            made("div", "sefi-foot", this.message, this.button),
        )
        this.element = made("div", "sefi-training", this.hint, this.body)
        this.element.setAttribute("aria-label", "Training")
        this.show(null)
    }

    /**
     * @param {number} width of the node
     * @returns {number} height that the panel takes on a node drawn on the canvas
     */
    height(width) {
        if (!this.training) return IDLE_HEIGHT
        const { sides, least, most } = PICTURES
        return HEIGHT_WITHOUT_PICTURES + Math.min(most, Math.max(least, (width - sides) / 3))
    }

    /** @param {object|null} training null shows the hint */
    show(training) {
        const other = training?.prompt_id !== this.training?.prompt_id
        if (other || training?.state !== this.training?.state) this.refused = ""
        if (other) this.asked = false
        this.training = training
        this.hint.hidden = !!training
        this.body.hidden = !training
        if (!training) return
        const { state, step, steps, placeholder } = training
        const running = state === "running"
        this.element.dataset.state = state
        this.heading.textContent = placeholder
        this.doing.textContent = running ? training.phase : (ENDED[state] ?? state)
        this.place.textContent = `step ${step} of ${steps}`
        this.bar.style.width = `${steps ? (100 * step) / steps : 0}%`
        this.progress.setAttribute("aria-valuenow", String(step))
        this.progress.setAttribute("aria-valuemax", String(steps))
        for (const [name, picture] of Object.entries(this.pictures))
            picture.show(training.pictures[name] ? this.addressOf(training, name) : "")
        for (const [name, curve] of Object.entries(this.curves))
            curve.show(training.losses[name] ?? [], step, steps)
        this.showFoot()
    }

    showFoot() {
        const { state, message, resumable, phase, seconds_left } = this.training
        const running = state === "running"
        this.button.hidden = !running
        this.button.disabled = this.asked
        this.button.textContent = this.asked ? "Stopping ..." : "Stop and keep"
        const left = running && phase === "learning" ? timeLeft(seconds_left) : ""
        const again = resumable && !running && state !== "finished"
        const offer = again ? `Queue again to go on from step ${resumable}.` : ""
        const said = [this.refused || message || left, offer]
        this.message.textContent = said.filter(Boolean).map(asSentence).join(" ")
        this.message.title = this.message.textContent
    }

    /** @param {(training: object) => Promise<string>} stop */
    async askToStop(stop) {
        const { training } = this
        this.asked = true
        this.showFoot()
        const refused = await stop(training)
        if (this.training?.prompt_id !== training.prompt_id) return
        this.refused = refused
        if (refused) this.asked = false
        this.showFoot()
    }
}

/**
 * @param {string} text
 * @returns {string} with a capital and a full stop
 */
function asSentence(text) {
    const begun = text[0].toUpperCase() + text.slice(1)
    return /[.!?]$/.test(begun) ? begun : `${begun}.`
}
