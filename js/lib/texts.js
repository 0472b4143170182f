/** What the page says, in the language that the frontend is set to: English or simplified Chinese. */

import { app } from "../../../scripts/app.js"

const NUMBER = /\d+(?:\.\d+)?/g

/** English text, with # in the place of numbers, and Chinese. */
export const CHINESE = {
    "Run, and watch the training here.": "运行后可在此处观看训练过程。",
    "End the training now, and go on with what it has learned so far":
        "立即结束训练，并使用目前已学到的内容继续运行",
    "Stop and keep": "停止并保留",
    "Stopping ...": "正在停止……",
    "step # of #": "第 # 步，共 # 步",
    "Queue it again to go on from step #.": "再次运行即可从第 # 步继续。",
    learned: "已学会",
    "stopped and kept": "已停止并保留",
    cancelled: "已取消",
    failed: "失败",
    loading: "加载中",
    "looking at the photo": "查看照片",
    learning: "学习中",
    "drawing the report": "绘制报告",
    "learned before with the same settings": "之前已用相同设置学会",
    "stopped at step # of #, and kept": "已在第 # 步（共 # 步）停止并保留",
    "cancelled at step # of #": "已在第 # 步（共 # 步）取消",
    "cancelled at step # of #; queue it again to go on from there":
        "已在第 # 步（共 # 步）取消；再次运行即可从该步继续",
    "stopped before the first step, and kept": "已在第一步之前停止并保留",
    "cancelled before the first step": "已在第一步之前取消",
    "going on from step # of #": "从第 # 步（共 # 步）继续",
    "a few seconds left": "还剩几秒",
    "about # s left": "约剩 # 秒",
    "about # min left": "约剩 # 分钟",
    "about # h left": "约剩 # 小时",
    photo: "照片",
    attention: "注意力",
    preview: "预览",
    noise: "噪声",
    leak: "泄漏",
    " loss": "损失",
    "The {name} loss of every step, and its course": "每一步的{name}损失及其走势",
    "ComfyUI was restarted during the training.": "训练期间 ComfyUI 已重新启动。",
    "ComfyUI does not answer.": "ComfyUI 没有响应。",
    "Learned on {when}": "学习于 {when}",
    "File of {when}": "文件日期 {when}",
    "# step": "# 步",
    "# steps": "# 步",
    "Does not fit: the checkpoint is {family}": "不匹配：checkpoint 属于 {family}",
    "Learned on {own}, but {file} is {family}": "在 {own} 上学习，但 {file} 属于 {family}",
    "This file is no identity, or is not in models/sefi.": "该文件不是身份，或不在 models/sefi 中。",
    "Save an identity with SeFi Save Identity, then choose it here.":
        "先用 SeFi 保存身份 保存一个身份，再在此处选择。",
    "Copy {it}": "复制 {it}",
    Copied: "已复制",
    "{it} is no identity here": "{it} 在此处不是身份",
    "It is read as plain text. Known: {names}.": "它会被当作普通文字读取。已知：{names}。",
    "Did you mean {it}? Upper and lower case count.": "您是指 {it} 吗？区分大小写。",
    "It is in the graph, but its SeFi Apply Identity does not lead to this prompt.":
        "它在工作流中，但其 SeFi 应用身份 没有连到此提示词。",
    Identities: "身份",
    "Hide advanced inputs": "隐藏高级输入",
    "Show advanced inputs": "显示高级输入",
}

/**
 * A text in the page's language; what has no translation stays as it is.
 *
 * @param {string} english
 * @param {Object<string, string>} [names] what stands in the place of {words}
 * @returns {string}
 */
export function say(english, names = {}) {
    const numbers = english.match(NUMBER) ?? []
    const text = isChinese() ? CHINESE[english.replace(NUMBER, "#")] : undefined
    const numbered = text === undefined ? english : text.replace(/#/g, () => numbers.shift() ?? "")
    return numbered.replace(/\{(\w+)\}/g, (word, name) => names[name] ?? word)
}

/** @returns {boolean} whether the frontend speaks simplified Chinese */
function isChinese() {
    return app.extensionManager?.setting.get("Comfy.Locale") === "zh"
}
